"""The bundled demo model: data generator, training, evaluation, and the checkpoint itself."""
