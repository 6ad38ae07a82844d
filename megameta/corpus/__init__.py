"""Offline work on text: readers, preprocessing, joining, inspection, audits, samples to train tokenizers on."""
