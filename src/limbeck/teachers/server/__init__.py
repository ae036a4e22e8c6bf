"""`limbeck teacher serve`: a model's targets over HTTP, for limbeck and for whoever speaks `/v1/topk` or logits."""
