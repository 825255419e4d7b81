"""One class for each way in which DeepSpeed's engine is run; `training/engine.py` has the table of them.

DeepSpeed's private names appear in this package only.
"""
