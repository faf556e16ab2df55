"""litgpt 0.5.13 for tests: the names, fields, parameters and layouts of what the peer uses, computed by plain torch."""
