"""Scores a model on text: perplexity of files, multiple choice, and EleutherAI's lm_eval.

`open_model.py` opens a run, an import or a Hugging Face folder; `reading.py` turns text into
requests; `likelihood.py` is the one place that scores them.
"""
