"""What was tried, on one harness; see NOTEBOOK.md. Run from the root of the checkout: python -m studies.NAME."""
