//! The macro that declares a table of the recipe, key by key.
//!
//! A declaration has the form
//!
//! ```text
//! table! {
//!     [lora]
//!     /// About the struct.
//!     pub struct Lora {
//!         /// rank of the adapter's matrices
//!         rank: usize = Count(1), default(16), Digest, ["r", "lora_rank" => "how to convert"];
//!     }
//! }
//! ```
//!
//! and says in this order:
//!
//! - What the key is about, on one or more lines. This text is the field's documentation, the
//!   key's line in `recipes/README.md` and its description in the JSON schema.
//! - The name of the key and of the field, and the field's Rust type.
//! - The [`Kind`](crate::kind::Kind) that reads, checks, writes and describes a value.
//! - What holds if the key is not given:
//!   - `default(value)`: this value.
//!   - `required("example")`: the recipe is refused, and the message shows the example.
//!   - `unset("meaning")`: the field is an `Option` and `None`. The meaning is for the reader.
//!   - `empty("meaning")`: the field is a list, and it is empty.
//!   - `computed(function, "meaning")`: what the function makes of the reader.
//! - The [`Scope`](crate::keys::Scope).
//! - What other tools, or habit, call the key, with a note if the value has to be converted.
//!   "table.name" counts in that table of ours only.
//!
//! A field that two keys fill is an enum. It has one declaration for each key in braces: first
//! the key with a default, then the key that replaces it, each with the variant that it makes.
//!
//! The macro makes the struct, its reader, and the [`Key`](crate::keys::Key)s of the table.

macro_rules! table {
    // The path of a key: "lora.rank", or "seed" at the top.
    (@path [] $key:ident) => {
        stringify!($key)
    };
    (@path [$table:ident] $key:ident) => {
        concat!(stringify!($table), ".", stringify!($key))
    };

    // The table inside a recipe.
    (@of [] $recipe:ident) => {
        $recipe
    };
    (@of [$table:ident] $recipe:ident) => {
        $recipe.$table
    };

    // The value of a field as an `Option`; `None` if the key is unset.
    (@held unset $text:tt, $field:expr) => {
        $field.as_ref()
    };
    (@held empty $text:tt, $field:expr) => {
        Some(&$field).filter(|items| !items.is_empty())
    };
    (@held $absent:ident $text:tt, $field:expr) => {
        Some(&$field)
    };

    // What the documentation says of a key that is not given.
    (@absent default ($value:expr), $kind:expr) => {
        $crate::keys::Absent::Is(|| $crate::kind::Kind::default_text(&$kind, stringify!($value), &$value))
    };
    (@absent required ($example:literal), $kind:expr) => {
        $crate::keys::Absent::Required($example)
    };
    (@absent unset ($meaning:literal), $kind:expr) => {
        $crate::keys::Absent::Unset($meaning)
    };
    (@absent empty ($meaning:literal), $kind:expr) => {
        $crate::keys::Absent::Unset($meaning)
    };
    (@absent computed ($function:path, $meaning:literal), $kind:expr) => {
        $crate::keys::Absent::Unset($meaning)
    };

    // Reads the value of a key.
    (@read $reader:ident $path:expr, $kind:expr, default ($value:expr)) => {
        $reader.with_default($path, &$kind, $value)
    };
    (@read $reader:ident $path:expr, $kind:expr, required ($example:literal)) => {
        $reader.required($path, &$kind, $example)
    };
    (@read $reader:ident $path:expr, $kind:expr, unset ($meaning:literal)) => {
        $reader.optional($path, &$kind)
    };
    (@read $reader:ident $path:expr, $kind:expr, empty ($meaning:literal)) => {
        $reader.optional($path, &$kind).unwrap_or_default()
    };
    (@read $reader:ident $path:expr, $kind:expr, computed ($function:path, $meaning:literal)) => {
        $reader.computed($path, &$kind, $function)
    };

    // Reads a field, from one key or from two.
    (@field $reader:ident $table:tt $field:ident = $kind:expr, $absent:ident $text:tt) => {
        table!(@read $reader table!(@path $table $field), $kind, $absent $text)
    };
    (@field $reader:ident $table:tt $field:ident {
        $(#[doc = $line1:literal])+
        $key1:ident as $enum1:ident::$variant1:ident = $kind1:expr, default $text1:tt, $scope1:ident, [$($rivals1:tt)*];
        $(#[doc = $line2:literal])+
        $key2:ident as $enum2:ident::$variant2:ident = $kind2:expr, unset $text2:tt, $scope2:ident, [$($rivals2:tt)*];
    }) => {{
        let value = table!(@read $reader table!(@path $table $key1), $kind1, default $text1);
        let replaced = table!(@read $reader table!(@path $table $key2), $kind2, unset $text2);
        replaced.map_or($enum1::$variant1(value), $enum2::$variant2)
    }};

    // One key. `$held` is its value in `$recipe`.
    (
        @key $path:expr, $instead_of:expr, [$($line:literal)+], $kind:expr, $absent:ident $text:tt, $scope:ident,
        [$($theirs:literal $(=> $note:literal)?),* $(,)?], $recipe:ident, $held:expr
    ) => {
        $crate::keys::Key {
            path: $path,
            about: concat!($($line),+).trim_ascii(),
            absent: table!(@absent $absent $text, $kind),
            in_digest: matches!($crate::keys::Scope::$scope, $crate::keys::Scope::Digest),
            shared: !matches!($crate::keys::Scope::$scope, $crate::keys::Scope::Local),
            rivals: &[$(($theirs, concat!("" $(, $note)?))),*],
            instead_of: $instead_of,
            words: || $crate::kind::Kind::words(&$kind),
            schema: || $crate::kind::Kind::schema(&$kind),
            is_table: || $crate::kind::Kind::is_table(&$kind),
            written: |$recipe: &$crate::Recipe| {
                Option::map($held, |value| $crate::kind::Kind::write(&$kind, value))
            },
            meaning: |$recipe: &$crate::Recipe| {
                Option::map($held, |value| $crate::kind::Kind::meaning(&$kind, value))
            },
        }
    };

    // The keys of a field: one or two.
    (
        @keys $table:tt $field:ident [$($line:literal)+]
        = $kind:expr, $absent:ident $text:tt, $scope:ident, [$($rivals:tt)*]
    ) => {
        &[table!(
            @key table!(@path $table $field), None, [$($line)+], $kind, $absent $text, $scope, [$($rivals)*],
            recipe, table!(@held $absent $text, table!(@of $table recipe).$field)
        )]
    };
    (@keys $table:tt $field:ident [$($line:literal)+] {
        $(#[doc = $line1:literal])+
        $key1:ident as $enum1:ident::$variant1:ident = $kind1:expr, default $text1:tt, $scope1:ident, [$($rivals1:tt)*];
        $(#[doc = $line2:literal])+
        $key2:ident as $enum2:ident::$variant2:ident = $kind2:expr, unset $text2:tt, $scope2:ident, [$($rivals2:tt)*];
    }) => {
        &[
            table!(
                @key table!(@path $table $key1), None,
                [$($line1)+], $kind1, default $text1, $scope1, [$($rivals1)*],
                recipe, match &table!(@of $table recipe).$field {
                    $enum1::$variant1(value) => Some(value),
                    _ => None,
                }
            ),
            table!(
                @key table!(@path $table $key2), Some(table!(@path $table $key1)),
                [$($line2)+], $kind2, unset $text2, $scope2, [$($rivals2)*],
                recipe, match &table!(@of $table recipe).$field {
                    $enum2::$variant2(value) => Some(value),
                    _ => None,
                }
            ),
        ]
    };

    // A table. Only the recipe itself, the table of the keys at the top, has tables in it.
    (
        $table:tt
        $(#[$about:meta])*
        pub struct $Struct:ident {
            $(
                $(#[doc = $line:literal])+
                $field:ident: $type:ty
                    $(= $kind:expr, $absent:ident $text:tt, $scope:ident, [$($rivals:tt)*])?
                    $({ $($pair:tt)* })?;
            )*
        }
        $(with { $($name:ident: $Inner:ident),* $(,)? })?
    ) => {
        $(#[$about])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $Struct {
            $($(#[doc = $line])+ pub $field: $type,)*
            $($(pub $name: $Inner,)*)?
        }

        impl $Struct {
            /// The keys of each field, in the order of the declaration.
            pub(crate) const KEYS: &'static [&'static [$crate::keys::Key]] = &[
                $(table!(
                    @keys $table $field [$($line)+]
                    $(= $kind, $absent $text, $scope, [$($rivals)*])?
                    $({ $($pair)* })?
                ),)*
            ];

            $(
                /// The names of the tables.
                pub(crate) const TABLES: &'static [&'static str] = &[$(stringify!($name)),*];

                /// The keys at the top, then those of each table.
                pub(crate) const ALL_KEYS: &'static [&'static [&'static [$crate::keys::Key]]] =
                    &[Self::KEYS, $($Inner::KEYS),*];
            )?

            /// Reads every key of the table. A problem is noted, and reading goes on.
            pub(crate) fn read(reader: &mut $crate::read::Reader<'_>) -> $Struct {
                $Struct {
                    $($field: table!(@field reader $table $field $(= $kind, $absent $text)? $({ $($pair)* })?),)*
                    $($($name: $Inner::read(reader),)*)?
                }
            }
        }
    };
}
