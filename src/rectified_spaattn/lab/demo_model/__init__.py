"""The embedded demo: a small text-to-video diffusion model trained on procedurally drawn videos."""
