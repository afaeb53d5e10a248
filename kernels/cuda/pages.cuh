// Page tables as kernels see them: edgeinfer/batch.py PageTable. Knows no attention.
#pragma once
#include "dev.cuh"

#define EI_PAGE 32           // positions of a page
#define EI_SEGMENT_PAGES 16  // pages whose partial attention folds into one segment

struct Table {
    const int* pages;
    int n_pages;
    int n_pinned;
    int n_visible;
};

// That of row `row`. tables: (first index into pages, n_pages, n_pinned, n_visible) of a sequence.
EI_DEV Table table_of(const int4* tables, const int* pages, const int* seq, int row) {
    const int4 entry = tables[seq[row]];
    return Table{pages + entry.x, entry.y, entry.z, entry.w};
}

// Page of the arena that holds absolute page `page`.
EI_DEV int arena_page(const Table& table, int page) {
    if (page < table.n_pinned) {
        return table.pages[page];
    }
    const int n_ring = table.n_pages - table.n_pinned;
    return table.pages[table.n_pinned + (page - table.n_pinned) % n_ring];
}

// Pages between the pinned ones and the ring that a query on absolute page `page` no longer sees.
EI_DEV int n_gone(const Table& table, int page) {
    return max(page - table.n_visible + 1 - table.n_pinned, 0);
}

// PageTable.pinned_pos: the position by which a query at `pos` is rotated for pinned pages.
EI_DEV long long pinned_pos(const Table& table, long long pos) {
    return pos - EI_PAGE * (long long)n_gone(table, (int)(pos / EI_PAGE));
}

// What a query sees: pages of two ranges, the pinned ones where some behind them are gone (its
// pinned q reads those), and all others; and of the page that holds it the positions up to its own.
struct Seen {
    int pinned_begin;
    int pinned_end;
    int begin;
    int end;
    int n_gone;
    int first_page;  // where its window begins: that page, counted without those that are gone,
    int first;       // and position in it
    int last;        // its own position in the last page
};

// window: positions that it sees, its own among them; 0 for all.
EI_DEV Seen seen_of(const Table& table, long long pos, int window) {
    Seen seen;
    const int page = (int)(pos / EI_PAGE);
    const long long first = window ? max(pinned_pos(table, pos) - window + 1, 0LL) : 0;
    seen.n_gone = n_gone(table, page);
    seen.first_page = (int)(first / EI_PAGE);
    seen.first = (int)(first % EI_PAGE);
    seen.last = (int)(pos % EI_PAGE);
    seen.end = page + 1;
    seen.pinned_end = seen.n_gone ? table.n_pinned : 0;
    seen.pinned_begin = min(seen.first_page, seen.pinned_end);
    seen.begin = max(seen.pinned_end, seen.first_page) + seen.n_gone;
    return seen;
}

// The first position that it sees of a page that it sees, and the one behind the last.
EI_DEV int first_seen(const Seen& seen, int page) {
    const int inside = page < seen.pinned_end ? page : page - seen.n_gone;
    return inside == seen.first_page ? seen.first : 0;
}

EI_DEV int end_seen(const Seen& seen, int page) {
    return page == seen.end - 1 ? seen.last + 1 : EI_PAGE;
}

// Segments with a page that it sees: those of pinned pages, then the others.
struct Segments {
    int first_pinned;
    int n_pinned;
    int first;
    int n;  // of both
};

EI_DEV Segments segments_of(const Seen& seen) {
    Segments segments;
    const int behind = (seen.pinned_end + EI_SEGMENT_PAGES - 1) / EI_SEGMENT_PAGES;
    const bool has_pinned = seen.pinned_begin < seen.pinned_end;
    segments.first_pinned = seen.pinned_begin / EI_SEGMENT_PAGES;
    segments.n_pinned = has_pinned ? behind - segments.first_pinned : 0;
    segments.first = max(seen.begin / EI_SEGMENT_PAGES, has_pinned ? behind : 0);
    const int n_others = (seen.end - 1) / EI_SEGMENT_PAGES + 1 - segments.first;
    segments.n = segments.n_pinned + max(n_others, 0);
    return segments;
}

// The absolute segment that comes as number i.
EI_DEV int segment_at(const Segments& segments, int i) {
    if (i < segments.n_pinned) {
        return segments.first_pinned + i;
    }
    return segments.first + i - segments.n_pinned;
}

// 8 values from x on as halves; zeros behind the first n.
EI_DEV uint4 pack_halves(const float* x, int n) {
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const unsigned low = 2 * i < n ? ei_to_half(x[2 * i]) : 0;
        const unsigned high = 2 * i + 1 < n ? ei_to_half(x[2 * i + 1]) : 0;
        words[i] = low | high << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}
