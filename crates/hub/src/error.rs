//! What can go wrong between this machine and the hub, and what to do about it.
//!
//! Addresses of single files are never shown: the hub signs some of them.

use std::time::Duration;

use finetune_advice::Advice;
use finetune_store::{StoreError, human_bytes};

use crate::repository::Kind;

/// Whose fault an error is, for the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// What the user asked for cannot be had.
    Input,
    /// The network or the hub: another try may succeed.
    Network,
    /// The disk is full or fails.
    Disk,
}

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// A text that is no id.
    #[error("{text:?} is no name of a repository on the hub")]
    NotAnId {
        /// The text.
        text: String,
    },

    /// The environment forbids the network.
    #[error("{what} is not in the Hugging Face cache, and HF_HUB_OFFLINE forbids to fetch it")]
    Offline {
        /// What is wanted.
        what: String,
        /// The arguments of `finetune download` that fetch it.
        fetch: String,
    },

    /// The environment forbids the network, and an upload needs it.
    #[error("HF_HUB_OFFLINE forbids the network, and an upload needs it")]
    OfflineUpload,

    /// No connection to the hub.
    #[error("the hub at {endpoint} cannot be reached: {what}")]
    Unreachable {
        /// Address of the hub.
        endpoint: String,
        /// What the system says.
        what: String,
    },

    /// There is no such repository, or it does not show itself.
    #[error("the hub has no {} {id}, or does not show it to {}", kind.noun(), if *has_token { "this token" } else { "everyone" })]
    Missing {
        /// The repository.
        id: String,
        /// Of which kind.
        kind: Kind,
        /// Whether a token was sent.
        has_token: bool,
    },

    /// The repository has no such branch, tag or commit.
    #[error("{id} has no revision {revision}")]
    NoRevision {
        /// The repository.
        id: String,
        /// The branch, tag or commit.
        revision: String,
    },

    /// The owner lets only some people at it.
    #[error("{id} is gated: its owner wants people to agree to conditions first{}", said(message))]
    Gated {
        /// The repository.
        id: String,
        /// Its page.
        page: String,
        /// Whether a token was sent.
        has_token: bool,
        /// What the hub says.
        message: String,
    },

    /// The hub does not accept the token.
    #[error("the hub does not accept the token{}", said(message))]
    BadToken {
        /// What the hub says.
        message: String,
    },

    /// Something needs a token, and there is none.
    #[error("the hub wants to know who asks, and there is no token")]
    NoToken,

    /// The token is valid and does not suffice.
    #[error("the hub forbids this for {id}{}", said(message))]
    Forbidden {
        /// The repository.
        id: String,
        /// What the hub says.
        message: String,
    },

    /// The hub does not take what it is sent.
    #[error("the hub refuses this for {id} (status {status}{})", more(message))]
    Refused {
        /// The repository.
        id: String,
        /// HTTP status.
        status: u16,
        /// What the hub says.
        message: String,
    },

    /// Nothing in the repository is wanted.
    #[error("{id} has no file {wanted}; it has {found}")]
    NoFile {
        /// The repository.
        id: String,
        /// What was looked for.
        wanted: String,
        /// Names of what is there.
        found: String,
    },

    /// No file of a dataset has the split.
    #[error("{id} has no rows {wanted}; it has {found}")]
    NoRows {
        /// The repository.
        id: String,
        /// What was looked for.
        wanted: String,
        /// What is there.
        found: String,
    },

    /// The weights are in a format that is not read.
    #[error("{id} has its weights as {found}, and none as safetensors")]
    NoSafetensors {
        /// The repository.
        id: String,
        /// The names.
        found: String,
    },

    /// The hub asks to come back later, again and again.
    #[error("the hub limits how often it is asked{}", after(wait))]
    Limited {
        /// How long it wants to be left alone.
        wait: Option<Duration>,
    },

    /// The hub fails.
    #[error("the hub answers with {status}{}", said(message))]
    Server {
        /// HTTP status.
        status: u16,
        /// What the hub says.
        message: String,
    },

    /// A transfer that ended too early, however often it was begun again.
    #[error("{file} came as far as {} of {} and no further: {what}", human_bytes(*done), human_bytes(*size))]
    Interrupted {
        /// The file.
        file: String,
        /// Bytes that are there.
        done: u64,
        /// Bytes of the whole.
        size: u64,
        /// What ended it.
        what: String,
    },

    /// The hub does not answer in time.
    #[error("the hub at {endpoint} has said nothing for {} s", silence.as_secs_f64())]
    Silent {
        /// Address of the hub.
        endpoint: String,
        /// How long.
        silence: Duration,
    },

    /// Bytes that are not those of the hub's own listing.
    #[error("{file} is not the file that the hub lists: {what}")]
    Differs {
        /// The file.
        file: String,
        /// How it differs.
        what: String,
    },

    /// An answer that makes no sense.
    #[error("the hub's answer about {id} cannot be used: {what}")]
    Answer {
        /// The repository.
        id: String,
        /// What is wrong with it.
        what: String,
    },

    /// Another process holds the repository and does not go on.
    #[error("another process fetches {id}, and nothing has come for {} s", waited.as_secs())]
    Held {
        /// The repository.
        id: String,
        /// How long.
        waited: Duration,
    },

    /// Nothing says where the cache is.
    #[error("nothing says where the Hugging Face cache is")]
    NoCache,

    /// The disk.
    #[error(transparent)]
    Disk(#[from] StoreError),
}

fn said(message: &str) -> String {
    let message = message.trim();
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}

fn more(message: &str) -> String {
    let message = message.trim();
    if message.is_empty() { String::new() } else { format!(": {message}") }
}

fn after(wait: &Option<Duration>) -> String {
    wait.map_or(String::new(), |wait| format!(" and asks to wait {} s", wait.as_secs()))
}

impl HubError {
    /// Whose fault it is.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Unreachable { .. }
            | Self::Limited { .. }
            | Self::Server { .. }
            | Self::Interrupted { .. }
            | Self::Silent { .. }
            | Self::Differs { .. }
            | Self::Held { .. } => Fault::Network,
            Self::Disk(error) if error.is_disk() => Fault::Disk,
            _ => Fault::Input,
        }
    }
}

/// How a token gets here.
const TOKEN: &str =
    "make a token at https://huggingface.co/settings/tokens, then `hf auth login` keeps it, or set HF_TOKEN";

impl Advice for HubError {
    fn hints(&self) -> Vec<String> {
        let again = "the same command goes on where this one stopped";
        let hints: Vec<&str> = match self {
            Self::NotAnId { .. } => vec!["a name is OWNER/NAME, with @REVISION for a branch, tag or commit"],
            Self::Offline { fetch, .. } => {
                return vec![format!("with a network, `HF_HUB_OFFLINE=0 finetune download {fetch}` fetches it")];
            }
            Self::OfflineUpload => vec!["set HF_HUB_OFFLINE=0 for this command"],
            Self::Unreachable { .. } => vec![
                "check the network; a proxy is named by HTTPS_PROXY, another hub by HF_ENDPOINT",
                "HF_HUB_OFFLINE=1 uses what is in the cache and asks nobody",
            ],
            Self::Missing { has_token: false, .. } => vec!["check the spelling, upper and lower case too", TOKEN],
            Self::Missing { .. } => {
                vec![
                    "check the spelling, upper and lower case too",
                    "for a private one the token needs the right to read it",
                ]
            }
            Self::NoRevision { id, .. } => {
                return vec![format!("leave the revision out for the branch main, or look at the branches of {id}")];
            }
            Self::Gated { page, has_token, .. } => {
                let mut hints = vec![format!("agree to the conditions at {page}, with the account of the token")];
                if !has_token {
                    hints.push(TOKEN.to_owned());
                }
                return hints;
            }
            Self::BadToken { .. } | Self::NoToken => vec![TOKEN],
            Self::Forbidden { .. } => vec!["use a token with the right to do this, of an account that may"],
            Self::Refused { .. } => vec!["the hub's words say what to change"],
            Self::NoFile { .. } => vec!["--include takes patterns such as '*.safetensors' (may be repeated)"],
            Self::NoRows { .. } => vec![
                "write hf://OWNER/NAME/SPLIT, or hf://OWNER/NAME/CONFIG/SPLIT, with a split that is there",
                "`finetune download --dataset OWNER/NAME --include PATTERN` fetches any file, which data.train can name",
            ],
            Self::NoSafetensors { id, found } if found.contains(".gguf") => {
                let name = found.split(", ").find(|name| name.ends_with(".gguf")).unwrap_or("NAME.gguf");
                return vec![format!(
                    "choose one of the GGUF files: `finetune download {id} --include '{name}'`, then name the file in the directory that this prints"
                )];
            }
            Self::NoSafetensors { .. } => vec![
                "look for a repository of the same model with safetensors files; pickles can run code and are not read",
            ],
            Self::Limited { .. } => vec![again, "with a token the hub allows more (`hf auth login`, or HF_TOKEN)"],
            Self::Interrupted { .. } | Self::Silent { .. } | Self::Server { .. } => vec![again],
            Self::Differs { .. } => vec![
                "the hub, or a proxy between, does not send what it lists: try again later",
                "name a commit (OWNER/NAME@COMMIT) if the repository is being changed",
            ],
            Self::Answer { .. } => vec![
                "if HF_ENDPOINT is set, it must be the address of a Hugging Face hub",
                "or the network answers itself: open its login page in a browser",
            ],
            Self::Held { .. } => vec!["end the other process, or wait until it is done"],
            Self::NoCache => vec!["set HF_HOME to a directory with room for models"],
            Self::Disk(error) => return error.hints(),
        };
        hints.into_iter().map(str::to_owned).collect()
    }
}
