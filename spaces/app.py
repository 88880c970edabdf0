"""The page of `san-backbones app`, as a Space of the Hugging Face Hub."""
from san_backbones.app import create, launch

demo = create()

if __name__ == '__main__':
    launch(demo, host='0.0.0.0', port=7860)
