"""What a person looks at: videos, figures and report.html."""
