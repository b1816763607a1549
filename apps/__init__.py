"""From a bundle to an app: the contract, the golden traces, and a project for each platform."""
