"""Parts of `experiments.report`: runs, groups of them, tables, pictures, the page."""
