// ---- UTF-8 and Unicode ---------------------------------------------------------------------------------------------

using Chars = std::u32string;

constexpr char32_t kReplacement = 0xFFFD;

void append_utf8(std::string& out, char32_t c) {
  const auto put = [&out](char32_t byte) { out += static_cast<char>(static_cast<unsigned char>(byte)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xC0 | (c >> 6));
    put(0x80 | (c & 63));
  } else if (c < 0x10000) {
    put(0xE0 | (c >> 12));
    put(0x80 | ((c >> 6) & 63));
    put(0x80 | (c & 63));
  } else {
    put(0xF0 | (c >> 18));
    put(0x80 | ((c >> 12) & 63));
    put(0x80 | ((c >> 6) & 63));
    put(0x80 | (c & 63));
  }
}

std::string utf8_of(std::u32string_view text) {
  std::string out;
  for (const char32_t c : text) append_utf8(out, c);
  return out;
}

// The characters of UTF-8; each longest part that is none is one U+FFFD, as Unicode recommends. whole: false if there was one.
Chars chars_of(std::string_view text, bool* whole = nullptr) {
  Chars out;
  if (whole != nullptr) *whole = true;
  for (std::size_t at = 0; at < text.size();) {
    const auto byte = [&text](std::size_t i) { return static_cast<unsigned char>(text[i]); };
    const unsigned char first = byte(at++);
    if (first < 0x80) {
      out += static_cast<char32_t>(first);
      continue;
    }
    std::size_t more = 0;
    unsigned char low = 0x80, high = 0xBF;
    char32_t value = 0;
    if (first >= 0xC2 && first <= 0xDF) {
      more = 1;
      value = first & 0x1Fu;
    } else if (first >= 0xE0 && first <= 0xEF) {
      more = 2;
      value = first & 0x0Fu;
      if (first == 0xE0) low = 0xA0;
      if (first == 0xED) high = 0x9F;
    } else if (first >= 0xF0 && first <= 0xF4) {
      more = 3;
      value = first & 0x07u;
      if (first == 0xF0) low = 0x90;
      if (first == 0xF4) high = 0x8F;
    }
    bool good = more > 0;
    for (std::size_t i = 0; i < more; ++i, low = 0x80, high = 0xBF) {
      if (at >= text.size() || byte(at) < low || byte(at) > high) {
        good = false;
        break;
      }
      value = (value << 6) | (byte(at++) & 0x3Fu);
    }
    out += good ? value : kReplacement;
    if (!good && whole != nullptr) *whole = false;
  }
  return out;
}

bool in_ranges(std::span<const Range> ranges, char32_t c) {
  const auto after = std::upper_bound(ranges.begin(), ranges.end(), c, [](char32_t v, const Range& r) { return v < r.first; });
  return after != ranges.begin() && c <= std::prev(after)->last;
}

bool is_space(char32_t c) {
  return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
         c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool is_letter(char32_t c) { return in_ranges(kLetters, c); }
bool is_mark(char32_t c) { return in_ranges(kMarks, c); }
bool is_number(char32_t c) { return in_ranges(kNumbers, c); }

bool is_word(char32_t c) { return is_letter(c) || is_mark(c) || in_ranges(kDigits, c) || in_ranges(kConnectors, c); }

bool is_punctuation(char32_t c) {
  const bool ascii = (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') || (c >= '{' && c <= '~');
  return ascii || in_ranges(kPunctuation, c);
}

// ---- NFC: decomposed, ordered by combining class, composed (Unicode, chapter 3.11) ----------------------------------

constexpr char32_t kHangul = 0xAC00, kLead = 0x1100, kVowel = 0x1161, kTail = 0x11A7;

int combining_class(char32_t c) {
  const auto after = std::upper_bound(std::begin(kCombining), std::end(kCombining), c, [](char32_t v, const Combining& r) { return v < r.first; });
  return after != std::begin(kCombining) && c <= std::prev(after)->last ? std::prev(after)->kind : 0;
}

void decompose(char32_t c, Chars& out) {
  if (c >= kHangul && c < kHangul + 11172) {
    const char32_t index = c - kHangul;
    out += kLead + index / 588;
    out += kVowel + index % 588 / 28;
    if (index % 28 != 0) out += kTail + index % 28;
    return;
  }
  const auto found = std::lower_bound(std::begin(kDecompositions), std::end(kDecompositions), c, [](const Decomposition& d, char32_t v) { return d.whole < v; });
  if (found == std::end(kDecompositions) || found->whole != c) {
    out += c;
    return;
  }
  decompose(found->first, out);
  if (found->second != 0) decompose(found->second, out);
}

// The character that two compose to, or 0.
char32_t composed(char32_t a, char32_t b) {
  static const std::map<std::pair<char32_t, char32_t>, char32_t> pairs = [] {
    std::map<std::pair<char32_t, char32_t>, char32_t> made;
    for (const Decomposition& d : kDecompositions)
      if (d.composes) made[{d.first, d.second}] = d.whole;
    return made;
  }();
  if (a >= kLead && a < kLead + 19 && b >= kVowel && b < kVowel + 21) return kHangul + ((a - kLead) * 21 + (b - kVowel)) * 28;
  if (a >= kHangul && a < kHangul + 11172 && (a - kHangul) % 28 == 0 && b > kTail && b < kTail + 28) return a + (b - kTail);
  const auto found = pairs.find({a, b});
  return found == pairs.end() ? 0 : found->second;
}

Chars nfd(const Chars& text) {
  Chars apart;
  for (const char32_t c : text) decompose(c, apart);
  for (std::size_t from = 0; from < apart.size();) {
    std::size_t to = from;
    while (to < apart.size() && combining_class(apart[to]) != 0) ++to;
    std::stable_sort(apart.begin() + static_cast<std::ptrdiff_t>(from), apart.begin() + static_cast<std::ptrdiff_t>(to),
                     [](char32_t a, char32_t b) { return combining_class(a) < combining_class(b); });
    from = to + 1;
  }
  return apart;
}

Chars nfc(const Chars& text) {
  if (std::all_of(text.begin(), text.end(), [](char32_t c) { return c < 0x300; })) return text;
  const Chars apart = nfd(text);
  Chars out;
  std::size_t starter = Chars::npos;
  int last = 0;
  for (const char32_t c : apart) {
    const int kind = combining_class(c);
    const bool reaches = starter != Chars::npos && (starter + 1 == out.size() || (last != 0 && last < kind));
    if (const char32_t whole = reaches ? composed(out[starter], c) : 0; whole != 0) {
      out[starter] = whole;
      continue;
    }
    if (kind == 0) starter = out.size();
    last = kind;
    out += c;
  }
  return out;
}

// ---- BERT's normalizer, step by step as the tokenizers library has it ------------------------------------------------

Chars cleaned(const Chars& text) {
  Chars out;
  for (const char32_t c : text)
    if (is_space(c) && c != 0x0B && c != 0x0C && c != 0x85) {
      out += U' ';
    } else if (c != 0 && !in_ranges(kDropped, c)) {
      out += c;
    }
  return out;
}

bool is_ideograph(char32_t c) {
  return (c >= 0x4E00 && c <= 0x9FFF) || (c >= 0x3400 && c <= 0x4DBF) || (c >= 0x20000 && c <= 0x2A6DF) || (c >= 0x2A700 && c <= 0x2B81F) ||
         (c >= 0x2B920 && c <= 0x2CEAF) || (c >= 0xF900 && c <= 0xFAFF) || (c >= 0x2F800 && c <= 0x2FA1F);
}

Chars with_ideographs_apart(const Chars& text) {
  Chars out;
  for (const char32_t c : text) out += is_ideograph(c) ? Chars{U' ', c, U' '} : Chars{c};
  return out;
}

Chars without_accents(const Chars& text) {
  Chars out;
  for (const char32_t c : nfd(text))
    if (!in_ranges(kAccents, c)) out += c;
  return out;
}

Chars lowered(const Chars& text) {
  Chars out;
  for (const char32_t c : text) {
    const auto found = std::lower_bound(std::begin(kLower), std::end(kLower), c, [](const Lower& l, char32_t v) { return l.whole < v; });
    const bool changes = found != std::end(kLower) && found->whole == c;
    out += changes ? found->first : c;
    if (changes && found->second != 0) out += found->second;
  }
  return out;
}
