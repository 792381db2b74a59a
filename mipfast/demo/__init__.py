"""The fictitious-people benchmark: its data, its tiny VLM, its shipped weights and the run that judges them."""
