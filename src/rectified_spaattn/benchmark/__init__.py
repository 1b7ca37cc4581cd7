"""How fast the operator is: shapes, dense baselines, checks, interleaved timing, and the rows they give."""
