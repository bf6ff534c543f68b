"""What the selector is worth: experiments on semantic similarity and transfer, and the pages made of their results."""
