"""Extensions that this model needs: files that register sharing strategies and routing methods.

None here; `code_mor.py` writes an import for each into an export.
"""

NAMES: tuple[str, ...] = ()
