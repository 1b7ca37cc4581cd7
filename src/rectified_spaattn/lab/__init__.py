"""What a generating user never imports: measuring calls, clips and speed, and the pages that show it."""
