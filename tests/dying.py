"""A process that dies while it writes."""


def dying(rename, writes, moment, source, target):
    """In the place of os.replace: dies at the first write right after the rename (moment "after"), or at the second
    before it, leaving the temporary file whole ("before") or cut in half ("half"). writes: the targets so far."""
    writes.append(target)
    if moment == "after" or len(writes) == 1:
        rename(source, target)
    else:
        left = source.read_bytes()
        source.with_name(f".99999.{target.name}").write_bytes(left[: len(left) // 2] if moment == "half" else left)
    if moment == "after" or len(writes) == 2:
        raise KeyboardInterrupt
