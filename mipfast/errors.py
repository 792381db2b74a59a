"""Every error mipfast raises on purpose: the text says what was found, what was expected and what to do."""


class MipfastError(Exception):
    """Base class; catch this one to catch all of them."""


class InputError(MipfastError):
    """A batch, a tensor or an argument that cannot be used."""


class ModelError(MipfastError):
    """A model whose FFN neurons cannot be found or hooked."""


class ArtefactError(MipfastError):
    """A saved file that is missing, damaged, or belongs to another model."""


class BackendError(MipfastError):
    """A kernel backend that was asked for and is not usable here."""


class DivergedError(MipfastError):
    """Training or scoring left the finite numbers."""
