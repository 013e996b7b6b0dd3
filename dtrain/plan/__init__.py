"""`dtrain plan`: what a model costs in memory, time and bytes before anything is launched, and what to run."""
