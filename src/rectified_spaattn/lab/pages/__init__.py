"""What people look at: figures, videos and pages."""
