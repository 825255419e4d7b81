"""Imported before other modules: collecting garbage would take a fifth of the time that their import takes."""

import gc

gc.disable()
