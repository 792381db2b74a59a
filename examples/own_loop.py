"""RMisU in a training loop of your own: mipfast's loss, your optimiser. Text only, whatever the model.

    python examples/own_loop.py                                   # Qwen/Qwen2.5-0.5B-Instruct, into ./edited
    python examples/own_loop.py --model DIR_OR_HUB_ID --steps 200 --lr 3e-3 --out FOLDER

Trained are the path's columns of the FFN output projections, by a mask on their gradients; nothing else moves.
mipfast.misdirect does the same without gradients of whole weights, and also the neurons' rows (trainable="path").
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mipfast
from mipfast.data import labelled

FORGET = [("The capital of France is", " Paris"), ("The Eiffel Tower stands in", " Paris")]
RETAIN = [("The capital of Italy is", " Rome"), ("The Colosseum stands in", " Rome"), ("Two and three make", " five")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="folder or Hub id")
    parser.add_argument("--out", default="edited", help="folder for the edited model")
    parser.add_argument("--fraction", type=float, default=0.1, help="of each layer's neurons that may be edited")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    out = Path(args.out).resolve()
    if (out.exists() and not out.is_dir()) or out == Path(args.model).resolve():
        parser.error(f"--out {args.out} is a file or the model's own folder; expected another folder")
    if args.steps < 1 or not args.lr > 0:
        parser.error(f"--steps {args.steps} --lr {args.lr}; expected at least 1 and a positive number")

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    forget = [labelled(tokenizer, *pair) for pair in FORGET]
    retain = [labelled(tokenizer, *pair) for pair in RETAIN]

    def judge(when):
        scores = [mipfast.evaluate(model, asked).accuracy for asked in (forget, retain)]
        print(f"{when}: {scores[0]:.0f} % of forget and {scores[1]:.0f} % of retain answered right")

    judge("before")
    sites = mipfast.find_sites(model)
    layer = 3 * sites.text.num_layers // 5  # where the hidden states are steered
    scoring = {"positions": "prompt", "objective": "log_odds"}
    found, kept_found = (mipfast.locate(model, batches, **scoring) for batches in (forget, retain))
    path = mipfast.NeuronPath.select(found, args.fraction, aggregate="snr", retain=kept_found)
    path = path.up_to(sites.text.name, layer)

    with torch.no_grad():  # of the model before the prune: what retain is held at, and how long the target is
        kept = [mipfast.hidden_states(model, one, layer) for one in retain]
        first = mipfast.hidden_states(model, forget[0], layer)
    target = mipfast.steering_target(mipfast.RMisUConfig(), first, torch.cat(kept))
    mipfast.prune(model, path).commit()

    model.requires_grad_(False)
    trained = []
    for (_, i), neurons in path.items():
        (weight, dim), *_ = sites.text.columns(i)
        mask = torch.zeros_like(weight).index_fill_(dim, neurons, 1.0)
        weight.requires_grad_(True).register_hook(lambda grad, mask=mask: grad * mask)
        trained.append(weight)
    optimizer = torch.optim.Adam(trained, lr=args.lr)  # without weight decay, which the mask would not stop
    for step in range(args.steps):
        f, r = step % len(forget), step % len(retain)
        hidden = [mipfast.hidden_states(model, one, layer) for one in (forget[f], retain[r])]
        losses = mipfast.rmisu_loss(*hidden, target, kept[r])
        optimizer.zero_grad()
        losses.loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step}: forget loss {losses.forget:.4f}, retain loss {losses.retain:.4f}")

    judge("after")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    path.save_pretrained(args.out)


if __name__ == "__main__":
    try:
        main()
    except mipfast.MipfastError as error:
        sys.exit(str(error))
