"""The app: one prompt with full attention, plain sparse and ours, in a browser. Only blocks.py knows gradio."""
