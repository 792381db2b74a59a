"""Two demos. Invented people: their world, a tiny VLM, its shipped weights, the run that judges it. And a pretrained
model: facts, the fetching of SmolLM2, real.py."""
