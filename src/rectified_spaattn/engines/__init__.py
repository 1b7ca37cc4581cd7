"""Adapters to engines that run diffusion transformers without diffusers' pipelines. They import the core only."""
