"""What gives scores: reward models, functions, servers, judges."""
