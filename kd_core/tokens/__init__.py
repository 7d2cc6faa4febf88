"""From text to token ids and batches: templates and encoding, packing, token maps, and the one place that shifts."""
