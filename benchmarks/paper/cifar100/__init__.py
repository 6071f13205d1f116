"""Tables 1 and 2 of the supplement, as the paper has them: CIFAR-100 and ResNet-50, in torch.

Settings are those of the authors' script. What differs:

* accuracy is that after the last epoch; their script keeps the epoch that is best on the test set,
  which gives more, with and without Gradient Centralization;
* on a GPU, products are taken in bfloat16.
"""
