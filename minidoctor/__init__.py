"""minidoctor: SparseDoctor (https://arxiv.org/abs/2509.14269) in a few readable files.

Read them in this order; each imports only files above it:
config, files, families, chat, pieces, tokenizer, data, exams, linear, lora, router, model, weights, expert_queue,
losses, memory, peft_layout, checkpoint, metrics, step, generate, prompts, letters, scoring, results, answers,
evaluate, export, specialization, routing_view, live_bytes, figures, picture, contenders, peers, peaks, bench,
trial, study.

Shapes in comments and docstrings use these letters:

    B  sequences in a batch       D  model dim            E  experts of a sublayer
    T  tokens in a sequence       H  query heads          K  experts that serve one token
    N  tokens, flattened          G  key/value heads      R  rank of one expert
    L  sublayers with experts     C  dim of one head      Z  dim of a routing vector
    V  vocabulary                 F  feed-forward dim     M  keys in the expert queue

In the queue's own shape (L, E, C, Z) the letter C is its capacity.
"""
