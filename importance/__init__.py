"""What bits are worth where: the scores that an allocation is made from."""
