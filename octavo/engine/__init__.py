"""Requests in, tokens out: block manager, scheduler, model runner, sampler."""
