"""A Task is data + loss + metrics: what the one training loop trains on. ``pretraining`` is the first.

A task is an object with

    vocab_size: int                                     ids are below this; the model's table is made for it
    identity: dict                                      JSON; a run may be continued only with an equal one
    (tokenizer, data) batches(start, rank, world_size) -> iterator        this process's MicroBatches from global
    sample index ``start`` on loss(model, batch) -> () fp32                       the SUM over the batch's targets
    evaluate(model, device, limit_tokens) -> dict       at least {"val_loss": nats per token}
    sample(model, device, tokens, seed) -> str          something to read, or ""
"""
