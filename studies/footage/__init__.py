"""The demo model fine-tuned on filmed clips, and the modes compared on it. Nothing of the clips is kept here.

python -m studies.footage.clips --out runs/footage.npz            # where ffmpeg is: decodes the clips of a package
python -m studies.footage.tune --clips runs/footage.npz --out runs/footage --seconds 110
python -m studies.footage --dtype bfloat16 --batch 6              # the table
"""
