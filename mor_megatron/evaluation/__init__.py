"""How good a trained model is: likelihood of text, how it routes, tasks of lm-eval."""
