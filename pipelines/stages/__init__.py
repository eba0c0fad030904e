"""The stages of the chain: data, model, step, validation and export of each."""
