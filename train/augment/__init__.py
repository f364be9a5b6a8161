"""`python -m train.augment`: more wordings of the questions that a model is trained on."""
