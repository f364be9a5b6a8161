"""`--task rate`: a sheet on which people judge answers, and what their judgements say."""
