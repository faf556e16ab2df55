"""Documents → tokens → shards → batches.

`corpus` reads documents, `tokenizer` turns them into token ids, `prepare` writes them as `shards`, `loader` serves
batches of them, `ngram` gives the baselines a model has to beat. Only `loader` imports torch. Every error here is a
`DataError`.
"""
