//! Notices about all rows together, each said once.

use crate::ends::EndCounts;
use crate::tokenizer::ChatTokenizer;

/// How often something was met, and the first row that has it.
#[derive(Debug, Default)]
pub(crate) struct Met {
    pub(crate) times: usize,
    /// Not known within one row.
    first: Option<String>,
}

impl Met {
    fn join(&mut self, other: &Self, place: &dyn Fn() -> String) {
        self.times += other.times;
        if other.times > 0 && self.first.is_none() {
            self.first = Some(place());
        }
    }

    /// The row, for the end of a notice.
    fn at(&self) -> String {
        self.first.as_ref().map_or_else(String::new, |first| format!(" (the first: {first})"))
    }
}

/// Names, and how often each was met.
#[derive(Debug, Default)]
struct Counted(Vec<(String, usize)>);

impl Counted {
    fn add(&mut self, name: String, times: usize) {
        let room = self.0.len() < 16 * NAMED;
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, count)) => *count += times,
            // Rows whose names are all different must not take unbounded memory.
            None if room => self.0.push((name, times)),
            None => {}
        }
    }

    /// The names, with how many of `what` have each. `None`: there are none.
    fn named(&self, what: &str) -> Option<String> {
        let named = |(name, times): &(String, usize)| format!("{} ({})", name.escape_debug(), counted(*times, what));
        let list: Vec<String> = self.0.iter().take(NAMED).map(named).collect();
        let more = if self.0.len() > NAMED { ", …" } else { "" };
        (!list.is_empty()).then(|| list.join(", ") + more)
    }
}

/// What the notices are made of, counted over one row or over many.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    /// Keys that have no use, and the number of rows that have them.
    unused: Counted,
    /// Roles that neither this program nor the chat template knows, and their messages.
    strange_roles: Counted,
    /// Conversations of which each answer became a sequence of its own.
    pub(crate) by_turn: usize,
    /// The sequences that they became.
    pub(crate) sequences: usize,
    /// Answers that flags keep from being trained on.
    pub(crate) muted: usize,
    /// Trained answers whose reasoning the template leaves out.
    pub(crate) without_reasoning: usize,
    /// Trained answers without reasoning that end at once what their prompt opens.
    pub(crate) closed_at_once: usize,
    /// Rows that have an end token with white space behind it, and get a second end token.
    pub(crate) ended_twice: usize,
    /// Trained answers without text, calls or reasoning.
    pub(crate) empty: Met,
    /// Calls whose arguments are text, and not the text of an object.
    pub(crate) no_arguments: Met,
    pub(crate) ends: EndCounts,
}

/// Which rows of the files are these.
pub(crate) struct Selection {
    /// Rows that were read, if there were more.
    pub(crate) max_rows: Option<usize>,
    pub(crate) share: Option<f64>,
    /// Rows of the other part.
    pub(crate) held_back: usize,
    /// Rows of both parts.
    pub(crate) rows: usize,
}

impl Selection {
    pub(crate) fn notices(&self) -> Vec<String> {
        let mut notices = Vec::new();
        if let Some(rows) = self.max_rows {
            notices.push(format!("data.max_rows = {rows}: no row behind the first {rows} is read"));
        }
        if let Some(share) = self.share {
            let (rows, held_back) = (self.rows, self.held_back);
            notices.push(format!("data.eval_share = {share} holds back {held_back} of {}", counted(rows, "row")));
        }
        notices
    }
}

/// The most keys that a notice names.
const NAMED: usize = 12;

impl Notes {
    pub(crate) fn unused(&mut self, keys: Vec<String>) {
        keys.into_iter().for_each(|key| self.unused.add(key, 1));
    }

    pub(crate) fn strange_role(&mut self, role: &str) {
        self.strange_roles.add(role.to_owned(), 1);
    }

    /// Adds the notes of a row; `place` names the row.
    pub(crate) fn join(&mut self, other: Self, place: &dyn Fn() -> String) {
        other.unused.0.into_iter().for_each(|(key, rows)| self.unused.add(key, rows));
        other.strange_roles.0.into_iter().for_each(|(role, times)| self.strange_roles.add(role, times));
        self.by_turn += other.by_turn;
        self.sequences += other.sequences;
        self.muted += other.muted;
        self.without_reasoning += other.without_reasoning;
        self.closed_at_once += other.closed_at_once;
        self.ended_twice += other.ended_twice;
        self.empty.join(&other.empty, place);
        self.no_arguments.join(&other.no_arguments, place);
        self.ends.join(other.ends);
    }

    /// The notices, the most important first. `format` is that of the rows.
    pub(crate) fn notices(&self, format: &str, tokenizer: Option<&ChatTokenizer>) -> Vec<String> {
        let mut notices = Vec::new();
        if self.by_turn > 0 {
            notices.push(format!(
                "{} became {}, one for each answer: the chat template writes a turn in another way once others follow, \
                 and each answer is trained on as the model will meet it",
                counted(self.by_turn, "conversation"),
                counted(self.sequences, "sequence")
            ));
        }
        if self.without_reasoning > 0 {
            notices.push(format!(
                "{} trained on without the reasoning that the rows have for them: the chat template leaves it out of \
                 earlier turns",
                are(self.without_reasoning, "answer")
            ));
        }
        if self.closed_at_once > 0 {
            notices.push(format!(
                "{} without reasoning behind a prompt that opens it: each begins with its end, so the model learns not \
                 to reason",
                are(self.closed_at_once, "answer")
            ));
        }
        if self.muted > 0 {
            notices.push(format!("{} not trained on, as their flags say (weight, train)", are(self.muted, "message")));
        }
        if self.empty.times > 0 {
            notices.push(format!(
                "{} empty{}: the model learns to say nothing there",
                are(self.empty.times, "trained answer"),
                self.empty.at()
            ));
        }
        if self.no_arguments.times > 0 {
            notices.push(format!(
                "the arguments of {} are text that holds no JSON object{}: the model learns to write them so",
                counted(self.no_arguments.times, "call"),
                self.no_arguments.at()
            ));
        }
        notices.extend(self.ends.notices(tokenizer));
        if self.ended_twice > 0 {
            notices.push(format!(
                "{} with an end token and white space: another end token is put behind it",
                if self.ended_twice == 1 { "1 row ends".to_owned() } else { format!("{} rows end", self.ended_twice) }
            ));
        }
        if let Some(roles) = self.strange_roles.named("message") {
            notices.push(format!("roles that the chat template does not name: {roles}"));
        }
        if let Some(keys) = self.unused.named("row") {
            notices.push(format!("keys that rows of format {format} have no use for: {keys}"));
        }
        notices
    }
}

fn counted(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

fn are(number: usize, what: &str) -> String {
    format!("{} {}", counted(number, what), if number == 1 { "is" } else { "are" })
}
