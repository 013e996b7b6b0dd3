"""Models that come with dtrain; each is called as ``model(batch) -> scalar mean loss``."""
