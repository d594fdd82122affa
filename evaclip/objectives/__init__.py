"""What is optimised. Each objective holds the model it trains and turns a batch into a loss (`engine.Objective`)."""
