"""Reports of runs and evaluations, as a page and as Markdown: what was measured, how sure it is, what is not known."""
