//! The digest of a base, which the ranks make together: by it a run and an adapter know their base, and ranks that have
//! other weights than each other refuse to start.
//!
//! Each rank has to know that the files that it computes with are those of the others. Of a file that several ranks of
//! a host read, one of them hashes it for all. A file that a rank does not read, since other ranks hold its layers, is
//! hashed by those. So a base of a trillion parameters is read once by each host that needs all of it, and in parts
//! where each host needs a part.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use finetune_model::{BaseFile, Model, Placement, base_digest, base_digest_of, base_files};
use finetune_store::{FileDigest, content_hash, hex, no_shard};

use crate::error::TrainError;
use crate::ranks::Ranks;

/// What a rank says of a file.
#[derive(Clone, Debug, PartialEq)]
struct Told {
    /// Without its content.
    file: FileDigest,
    /// A word that is the same of the same file of the same machine. `None`: the file is not here.
    copy: Option<String>,
    /// Whether the rank computes with it.
    is_needed: bool,
}

/// The digest of a base: that of one process that reads all of its files. All ranks call it together. `machine`: a text
/// that ranks share if they are on one machine; `None`: it is not known, and this rank shares nothing.
///
/// # Errors
/// If the ranks have other files than each other, a file that none has, or one that cannot be read.
pub(crate) fn digest_together(
    directory: &Path,
    placement: &Placement,
    machine: Option<&str>,
    ranks: &Ranks,
) -> Result<String, TrainError> {
    let (rank, world) = (ranks.group().rank(), ranks.group().world());
    if world == 1 {
        return Ok(base_digest(directory)?);
    }
    let needed = Model::files_of(directory, placement)?;
    let told = |BaseFile { digest: file, opened }: BaseFile| {
        let word =
            |machine: &str, word: &str| blake3::hash(format!("{machine} {word}").as_bytes()).to_hex().to_string();
        let copy = opened.map(|opened| match machine {
            Some(machine) => word(machine, &opened.word()),
            None => word("rank", &rank.to_string()),
        });
        // Of a GGUF file all is needed: it names none.
        let is_needed = needed.is_empty() || needed.contains(&file.name);
        Told { file, copy, is_needed }
    };
    let mine: Vec<Told> = base_files(directory, &|_| false)?.into_iter().map(told).collect();
    let of_ranks = gather(&mine, ranks)?;
    merged_of(&without_content(&of_ranks), ranks)?;
    let dealt: Vec<&str> = deal(&of_ranks).remove(rank).into_iter().map(|n| mine[n].file.name.as_str()).collect();
    let hashed = base_files(directory, &|name| dealt.contains(&name))?;
    let contents = gather_contents(hashed.iter().map(|file| &file.digest), ranks)?;
    let files = merged_of(&with_content(of_ranks, &contents), ranks)?;
    match base_digest_of(directory, &files)? {
        Some(digest) => Ok(digest),
        None => {
            let absent = files.iter().find(|file| file.content.is_none());
            Err(TrainError::Store(no_shard(directory, absent.map_or("", |file| &file.name))))
        }
    }
}

/// Stands for [`digest_together`] on a rank whose model is made afresh: if others have files, all of them hear it.
///
/// # Errors
/// If they have.
pub(crate) fn expect_no_files(ranks: &Ranks) -> Result<(), TrainError> {
    if ranks.group().world() == 1 {
        return Ok(());
    }
    let of_ranks = gather(&[], ranks)?;
    merged_of(&without_content(&of_ranks), ranks).map(drop)
}

/// Refuses ranks that use other models than each other: other settings, tokenizers or adapters, other names, lengths or
/// headers of weights, or other bytes in a sample of each file of weights. Reading all of them would take longer than
/// many an answer. All ranks call it together.
///
/// # Errors
/// Who has what other file than whom.
pub(crate) fn expect_same_model(directory: &Path, adapter: Option<&Path>, ranks: &Ranks) -> Result<(), TrainError> {
    const BESIDE: [&str; 4] = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
    const OF_ADAPTER: [&str; 3] = ["adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"];
    if ranks.group().world() == 1 {
        return Ok(());
    }
    let weights = base_files(directory, &|_| false)?.into_iter().map(|BaseFile { digest, opened }| {
        let content = opened.and_then(|file| sample(file.path()).ok());
        FileDigest { content, ..digest }
    });
    let of_adapter = adapter.into_iter().flat_map(|adapter| OF_ADAPTER.iter().map(|name| adapter.join(name)));
    let beside = BESIDE.iter().map(|name| directory.join(name)).chain(of_adapter).map(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let content = content_hash(&path).map_or("absent".to_owned(), |hash| hex(&hash));
        FileDigest { name, length: 0, header: "-".to_owned(), content: Some(content) }
    });
    let mine: Vec<FileDigest> = beside.chain(weights).collect();
    let contents = gather_contents(mine.iter(), ranks)?;
    let told: Vec<Told> = mine.into_iter().map(|file| Told { file, copy: None, is_needed: true }).collect();
    merged_of(&with_content(gather(&told, ranks)?, &contents), ranks).map(drop)
}

/// The hash of some of a file's bytes, from its beginning to its end. A model that was trained further has others in it.
fn sample(path: &Path) -> std::io::Result<String> {
    const PIECES: u64 = 64;
    const PIECE: u64 = 4 << 10;
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let (mut hasher, mut bytes) = (blake3::Hasher::new(), vec![0; PIECE.min(length) as usize]);
    for piece in 0..PIECES {
        file.read_exact_at(&mut bytes, length.saturating_sub(PIECE) / (PIECES - 1) * piece)?;
        hasher.update(&bytes);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// What each rank says of its files.
fn gather(mine: &[Told], ranks: &Ranks) -> Result<Vec<Vec<Told>>, TrainError> {
    let lines: Vec<String> = mine.iter().map(to_line).collect();
    let all = ranks.gather_texts(&lines.join("\n"))?;
    Ok(all.iter().map(|text| text.lines().filter_map(from_line).collect()).collect())
}

/// The contents that each rank knows of its files: a line for each file.
fn gather_contents<'f>(files: impl Iterator<Item = &'f FileDigest>, ranks: &Ranks) -> Result<Vec<String>, TrainError> {
    let contents: Vec<&str> = files.map(|file| file.content.as_deref().unwrap_or("-")).collect();
    Ok(ranks.gather_texts(&contents.join("\n"))?)
}

/// The name is the last word: it has no line break, but may have spaces.
fn to_line(told: &Told) -> String {
    let Told { file: FileDigest { name, length, header, .. }, copy, is_needed } = told;
    let needed = if *is_needed { "needed" } else { "-" };
    format!("{length} {header} {} {needed} {name}", copy.as_deref().unwrap_or("-"))
}

fn from_line(line: &str) -> Option<Told> {
    let mut words = line.splitn(5, ' ');
    let (length, header, copy) = (words.next()?.parse().ok()?, words.next()?.to_owned(), words.next()?);
    let (is_needed, name) = (words.next()? == "needed", words.next()?.to_owned());
    let copy = Some(copy).filter(|copy| *copy != "-").map(str::to_owned);
    Some(Told { file: FileDigest { name, length, header, content: None }, copy, is_needed })
}

fn without_content(of_ranks: &[Vec<Told>]) -> Vec<Vec<FileDigest>> {
    of_ranks.iter().map(|files| files.iter().map(|told| told.file.clone()).collect()).collect()
}

/// The files of each rank with the contents that it has hashed: a line for each file.
fn with_content(of_ranks: Vec<Vec<Told>>, contents: &[String]) -> Vec<Vec<FileDigest>> {
    let of_rank = |(files, contents): (Vec<Told>, &String)| {
        let each = files.into_iter().zip(contents.lines());
        let content = |content: &str| Some(content).filter(|content| *content != "-").map(str::to_owned);
        each.map(|(told, line)| FileDigest { content: content(line), ..told.file }).collect()
    };
    of_ranks.into_iter().zip(contents).map(of_rank).collect()
}

/// The numbers of the files that each rank hashes. Each copy of a file that a rank needs is hashed once, by the one of
/// those that need it that has the fewest bytes so far; a file that no rank needs by the first that has it.
fn deal(of_ranks: &[Vec<Told>]) -> Vec<Vec<usize>> {
    let mut dealt = vec![Vec::new(); of_ranks.len()];
    let mut bytes = vec![0; of_ranks.len()];
    for n in 0..of_ranks.first().map_or(0, Vec::len) {
        let here = || of_ranks.iter().enumerate().filter_map(|(rank, files)| Some((rank, files.get(n)?)));
        let mut copies: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (rank, told) in here().filter(|(_, told)| told.is_needed) {
            if let Some(copy) = &told.copy {
                copies.entry(copy).or_default().push(rank);
            }
        }
        let anyone = || here().find(|(_, told)| told.copy.is_some()).map(|(rank, _)| vec![rank]);
        let groups: Vec<Vec<usize>> =
            if copies.is_empty() { anyone().into_iter().collect() } else { copies.into_values().collect() };
        for group in groups {
            if let Some(&rank) = group.iter().min_by_key(|&&rank| (bytes[rank], rank)) {
                dealt[rank].push(n);
                bytes[rank] += of_ranks[rank][n].file.length;
            }
        }
    }
    dealt
}

/// [`merged`], of the ranks of a group.
///
/// # Errors
/// Who has another file than whom.
fn merged_of(of_ranks: &[Vec<FileDigest>], ranks: &Ranks) -> Result<Vec<FileDigest>, TrainError> {
    let host = |rank: usize| ranks.group().who()[rank].host.clone();
    merged(of_ranks, &host).map_err(|differences| TrainError::Differ { differences })
}

/// The files of all ranks, each with its content if a rank has hashed it. `host`: the name of a rank's host.
///
/// # Errors
/// Who has another file than whom, a line for each.
fn merged(of_ranks: &[Vec<FileDigest>], host: &dyn Fn(usize) -> String) -> Result<Vec<FileDigest>, Vec<String>> {
    let mut files = of_ranks.first().cloned().unwrap_or_default();
    let mut holders: Vec<usize> = vec![0; files.len()];
    let mut differences = Vec::new();
    for (rank, theirs) in of_ranks.iter().enumerate().skip(1) {
        let about = |file: &FileDigest| (file.name.clone(), file.length, file.header.clone());
        if !files.iter().map(about).eq(theirs.iter().map(about)) {
            differences.push(format!("rank {rank} ({}) has another base model (model.path) than rank 0", host(rank)));
            continue;
        }
        for ((file, holder), other) in files.iter_mut().zip(&mut holders).zip(theirs) {
            match (&file.content, &other.content) {
                (Some(known), Some(other)) if known != other => {
                    let name = &file.name;
                    differences.push(format!("rank {rank} ({}) has another {name} than rank {holder}", host(rank)));
                }
                (None, Some(content)) => (file.content, *holder) = (Some(content.clone()), rank),
                _ => {}
            }
        }
    }
    if differences.is_empty() { Ok(files) } else { Err(differences) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(name: &str, content: Option<&str>) -> FileDigest {
        let header = if name.ends_with('!') { "other" } else { "header" }.to_owned();
        let (name, content) = (name.trim_end_matches('!').to_owned(), content.map(str::to_owned));
        FileDigest { name, length: 9, header, content }
    }

    /// `a:1` is file `a` with content 1, `a:-` one whose content is not known, `a!` one with another header.
    fn files(text: &str) -> Vec<FileDigest> {
        let file = |word: &str| {
            let (name, content) = word.split_once(':').expect("a name and its content");
            digest(name, Some(content).filter(|content| *content != "-"))
        };
        text.split_whitespace().map(file).collect()
    }

    /// `a@x` is file `a` whose copy is called x and which is needed, `(a@x)` one that is not needed, `a@-` one that is
    /// not here.
    fn told(text: &str) -> Vec<Told> {
        let told = |word: &str| {
            let (name, copy) = word.trim_matches(['(', ')']).split_once('@').expect("a name and a copy");
            let copy = Some(copy).filter(|copy| *copy != "-").map(str::to_owned);
            Told { file: digest(name, None), copy, is_needed: !word.starts_with('(') }
        };
        text.split_whitespace().map(told).collect()
    }

    /// (files of each rank, those of all together or who differs)
    #[test]
    fn ranks_have_the_whole_base_together() {
        let cases: [(&[&str], Result<&str, &str>); 8] = [
            (&["a:1 b:2"], Ok("a:1 b:2")),
            (&["a:1 b:-", "a:- b:2"], Ok("a:1 b:2")),
            (&["a:1 b:-", "a:1 b:2", "a:- b:2"], Ok("a:1 b:2")),
            (&["a:1 b:-", "a:- b:-"], Ok("a:1 b:-")),
            (&["a:- b:2", "a:1 b:2", "a:3 b:-"], Err("rank 2 (h2) has another a than rank 1")),
            (&["a:1 b:-", "a!:- b:2"], Err("rank 1 (h1) has another base model (model.path) than rank 0")),
            (&["a:1 b:2", "a:1"], Err("rank 1 (h1) has another base model (model.path) than rank 0")),
            (&["a:1 b:2", ""], Err("rank 1 (h1) has another base model (model.path) than rank 0")),
        ];
        for (ranks, want) in cases {
            let of_ranks: Vec<Vec<FileDigest>> = ranks.iter().map(|text| files(text)).collect();
            let got = merged(&of_ranks, &|rank| format!("h{rank}"));
            assert_eq!(got, want.map(files).map_err(|line| vec![line.to_owned()]), "{ranks:?}");
        }
    }

    /// (files of each rank, what each hashes)
    #[test]
    fn each_copy_of_a_file_that_is_needed_is_hashed_once() {
        let cases: [(&[&str], &[&[usize]]); 7] = [
            (&["a@x b@x"], &[&[0, 1]]),
            // One machine with two ranks, which need everything.
            (&["a@x b@y c@z", "a@x b@y c@z"], &[&[0, 2], &[1]]),
            // Two machines with a copy each.
            (&["a@x b@y", "a@u b@v"], &[&[0, 1], &[0, 1]]),
            // Two machines with two ranks each.
            (&["a@x b@y", "a@x b@y", "a@u b@v", "a@u b@v"], &[&[0], &[1], &[0], &[1]]),
            // Each machine has the whole base, and each rank needs a part of it.
            (&["a@x (b@y)", "(a@u) b@v"], &[&[0], &[1]]),
            // What nobody needs is hashed by the first that has it.
            (&["a@x (b@-) (c@-)", "(a@-) (b@v) (c@-)"], &[&[0], &[1]]),
            (&["a@x", "a@x", "a@-"], &[&[0], &[], &[]]),
        ];
        for (ranks, want) in cases {
            let of_ranks: Vec<Vec<Told>> = ranks.iter().map(|text| told(text)).collect();
            assert_eq!(deal(&of_ranks), want, "{ranks:?}");
        }
    }

    /// A file that differs anywhere in a long stretch, as after more training, has another sample.
    #[test]
    #[expect(clippy::disallowed_methods, reason = "a file of the test")]
    fn a_sample_tells_models_of_one_form_apart() {
        let folder = tempfile::tempdir().expect("a folder");
        let of = |bytes: &[u8]| {
            let path = folder.path().join("weights");
            std::fs::write(&path, bytes).expect("written");
            sample(&path).expect("a sample")
        };
        for length in [0, 10, 4096, 5000, 4 << 20] {
            let mut bytes = vec![7; length];
            let first = of(&bytes);
            assert_eq!(of(&bytes), first, "{length}");
            bytes[length / 3..length / 2].fill(8);
            assert_eq!(of(&bytes) == first, length == 0, "{length}");
        }
    }

    #[test]
    fn what_is_told_of_a_file_is_read_again() {
        let odd = Told { file: digest("with space.safetensors", None), ..told("a@x").remove(0) };
        for told in told("a@x (b@y) c@-").into_iter().chain([odd]) {
            assert_eq!(from_line(&to_line(&told)), Some(told));
        }
    }

    #[test]
    fn contents_go_to_the_files_of_the_rank_that_has_hashed_them() {
        let of_ranks = vec![told("a@x b@y"), told("a@x b@y")];
        let contents = ["1\n-".to_owned(), "-\n2".to_owned()];
        assert_eq!(with_content(of_ranks, &contents), [files("a:1 b:-"), files("a:- b:2")]);
    }
}
