"""Single attention calls of a running pipeline: captured, judged by full attention, mapped block by block."""
