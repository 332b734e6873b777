"""The network: masking, stem, encoder, decoder, autoencoder, segmenter."""
