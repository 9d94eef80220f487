"""A thin REINFORCE++ trainer on `rpp_kernels`: one flat loop, any Hugging Face causal LM. Start at `train.py`."""
