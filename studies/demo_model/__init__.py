"""Training of the demo model that the package carries, and the scenes it is trained on."""
