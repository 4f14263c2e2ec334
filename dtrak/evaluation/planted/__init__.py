"""Foreign images planted in the training set: does a method find them again?"""
