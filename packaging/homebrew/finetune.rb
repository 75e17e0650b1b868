# A formula for a tap. `scripts/package.sh --formula` fills in version and checksums of a release.
class Finetune < Formula
  REPOSITORY = "OWNER/NAME".freeze # on GitHub: the one line to change

  desc "Fine-tunes large language models with LoRA on the machine you have"
  homepage "https://github.com/#{REPOSITORY}"
  version "0.1.0"
  license "Apache-2.0"

  on_macos do
    on_arm do
      url "https://github.com/#{REPOSITORY}/releases/download/v#{version}/finetune-#{version}-aarch64-apple-darwin.tar.gz"
      sha256 "CHECKSUM_OF_aarch64-apple-darwin"
    end
  end

  on_linux do
    on_arm do
      url "https://github.com/#{REPOSITORY}/releases/download/v#{version}/finetune-#{version}-aarch64-unknown-linux-gnu.tar.gz"
      sha256 "CHECKSUM_OF_aarch64-unknown-linux-gnu"
    end
    on_intel do
      url "https://github.com/#{REPOSITORY}/releases/download/v#{version}/finetune-#{version}-x86_64-unknown-linux-gnu.tar.gz"
      sha256 "CHECKSUM_OF_x86_64-unknown-linux-gnu"
    end
  end

  def install
    bin.install "finetune"
    man1.install Dir["man/man1/*.1"]
    bash_completion.install "completions/finetune.bash" => "finetune"
    zsh_completion.install "completions/_finetune"
    fish_completion.install "completions/finetune.fish"
  end

  test do
    assert_match "finetune #{version}", shell_output("#{bin}/finetune --version")
    system bin/"finetune", "devices"
  end
end
