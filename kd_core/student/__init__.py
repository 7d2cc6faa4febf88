"""Making a student: from a config, from the teacher's blocks, from a pre-trained model."""
